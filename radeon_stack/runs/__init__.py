"""The record of each run: directory, events, status, report."""
