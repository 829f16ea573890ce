"""Entry point of the group `verl.plugins`: runs the file that OFFRL_VERL names.

verl loads its plug-ins in the driver and in every worker process, which is where names of losses
and estimators must be registered. It reports a plug-in that fails at debug level only, so that the
symptom is an unknown name much later; this one logs the error itself. Without OFFRL_VERL it does
nothing and imports nothing, neither torch nor verl.

The variable must reach all machines, as any other of Ray's `runtime_env`.
`VERL_USE_EXTERNAL_MODULES` or `model.external_lib`, with an importable module, do the same.
"""

import logging
import os
import runpy

if path := os.environ.get("OFFRL_VERL"):
    try:
        runpy.run_path(path, run_name="offrl_verl")
    except Exception:
        logging.getLogger(__name__).exception("OFFRL_VERL=%s failed, nothing is registered", path)
        raise
