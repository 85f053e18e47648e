"""Settings: their schema, loading, presets and chains. No I/O except YAML."""
