"""Scripts that make the tables and plots; run them as ``python -m experiments.NAME``."""

# Columns that several tables have.
IMAGES = ("mse", "ssim", "fid_c", "kid_c", "fid", "kid")
UNITS = ("kl", "collapsed_units", "dead_units", "fano")
