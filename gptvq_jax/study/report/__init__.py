"""The report of scripts/report.py: what runs and sweeps came to, as one page and its figures."""
