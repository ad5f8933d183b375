"""How fast are we, beside whom, and on what? `fa2gen bench`.

points      what is measured: the presets, and the FLOPs of a point
peers       who is measured: ours and every peer that is installed, each behind one callable
protocol    how: CUDA events, L2 flushed, everyone in turn
provenance  on what: GPU, clocks, versions
run         the loop over points, with a row of JSON for each
report      what it means: ratios to the best peer and their geometric mean
plot        bar charts from committed JSON, in the style of the paper's figures 4 to 7

Nothing here is imported before it is used: `import fa2gen.bench` costs nothing.
"""
