"""From files to shards: source -> model -> validate -> snapshot. See each module."""
