"""Scripts that make the tables and plots; run them as ``python -m experiments.NAME``."""

# Columns that several tables have.
IMAGES = ("mse", "ssim", "rfid_c", "fid_c", "kid_c", "rfid", "fid", "kid")
UNITS = ("kl", "collapsed_units", "dead_units", "fano")
