"""Ready-made annotation configurations, one YAML file each."""
