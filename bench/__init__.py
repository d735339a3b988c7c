"""Measurements: one module per question, each with ``main(arguments)``. They print figures and judge nothing.

``python -m bench`` lists them, ``python -m bench NAME --help`` says more. They need root and a machine with nothing
else to do; of two figures from different runs only the ratio to the peer in the same run means anything.
"""
