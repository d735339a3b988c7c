"""Measurements: one module per question, each with ``main(arguments)``. They print figures and judge nothing.

``python -m bench`` lists them, ``python -m bench NAME --help`` says more, ``make bench`` asks them all and
``make bench FULL=1`` writes `RESULTS.md`. They need root, what ``tools/setup bench`` installs, and a machine with
nothing else to do; of two figures from different runs only the ratio to the peer in the same run means anything.

    _question   a question, and the run that puts it to all systems in turn
    _systems    the systems, where they stand and what of them is counted; their configurations are in `configs/`
    _load       the drivers
    _figures    medians, spreads, ratios, the JSON document; _report and _chart show it
"""
