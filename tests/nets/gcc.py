"""Tests of what gcc compiles. Without gcc the library takes its torch forms, which is tested apart.

Where there is a gcc that does not compile, these tests fail rather than skip.
"""

import shutil
import sys

import pytest

GCC = sys.platform == "linux" and shutil.which("gcc") is not None
needs_gcc = pytest.mark.skipif(not GCC, reason="no gcc: the compiled form is not in use")
