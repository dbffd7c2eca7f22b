"""Stand-ins: what LND, CLN and phoenixd say on the wire, before a node that is not one of them.

Each speaks the shapes that its project documents, and none was made from a real one's answers. The
node behind them all is the simulated network, which does real BOLT11, keeps its state on disk, and
goes wrong as it is told. `tests/test_real_nodes.py` runs the same suite against a real node.
"""
