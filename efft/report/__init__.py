"""What records of runs say: selection, statistics, fronts, tables, plots, a page, recommendations.

Nothing here imports jax: a report is read and written in seconds on any machine.
"""
