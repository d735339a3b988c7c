"""Meshes one can run, and the stage they run on."""
