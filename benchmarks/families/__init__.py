"""Every family of causal language models in transformers, tiny and random, through the harness by several methods.

    python -m benchmarks.families [families=llama,opt] [methods=none,rtn] [bits=8] [processes=1] [output=FILE.md]

A cell of the table is one run of a saved model by `execute_run`, as a user does it, with the default measure. A cell
is good if its run is ok and agrees with computations by other code (`checks`), or if it is refused in one clear line.

    shapes.yaml  the shapes of the models, and the families that are left out with their reasons
    models       builds and saves the models
    checks       what must hold for a run that is ok
    cells        runs one cell and judges it
    table        prints the table, the counts and the distinct messages
"""
