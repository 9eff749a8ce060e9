"""The fields of a config, and where they stand."""
