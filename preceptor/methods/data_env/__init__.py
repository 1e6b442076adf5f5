"""data_env: agents write what a student is taught."""
