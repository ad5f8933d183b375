"""Which tiling is fastest on this GPU? `fa2gen tune`.

space     every feasible tiling, with every setting of the schedule switches
cost      the model that ranks feasible tilings before anything is compiled; of each pass in cost_fwd and cost_bwd, and
          what an SM does in a cycle in rates
search    prune, check, time, halve; the only place with a strategy
journal   what was measured, one JSON line each, so that a second run goes on where the first one stopped
gpu       the part that needs a device: compile ahead in threads, check with the project's rule, time with its protocol
record    the winner, as rows of specs/tuned/

There are a few hundred to a few thousand candidates a problem, few enough to rank them all and to time the best few
dozen. So there is no search library here, and no search code beyond halving.
"""
