"""What happens between a downstream and an upstream stream: HTTP exchanges, or opaque bytes."""
