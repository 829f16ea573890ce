"""The methods, one file each. A module here ends with METHOD = Method(...)."""
