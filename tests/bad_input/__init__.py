"""What goes wrong, and what it says: one table from which a test runs every case, and from which `ERRORS.md` is written.

python -m tests.bad_input --write
"""
