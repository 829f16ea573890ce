"""The methods, one file each. A module here offers FIELDS, Config, make and stages."""
