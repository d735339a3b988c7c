"""What is counted and shown: recording in the workers, rendering in the brain."""
