"""U1 and C1: what the reference costs without the union of times, and what a compiler makes of
that.

U0 is `gfnode_fast.reference.FourierMD` itself.
"""
