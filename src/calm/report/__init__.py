"""What came out of a replay or a bench: rows, figures with intervals, tables and plots.

records.py     Row (a request), Trial (one policy, one seed), Study (everything that was run)
figures.py     rows -> mean, percentiles, energy, quality, hit rate, loads, SLO attainment
intervals.py   bootstrap confidence intervals over seeds, paired ratios between candidates
tables.py      the table people read
plots.py       the pictures, each kind in a plot_*.py beside it: Pareto, latency CDF, residency, adaptation
files.py       a study's directory: trials as they end, resumed when interrupted
"""
