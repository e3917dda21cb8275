"""What every package may use.

    files.py         atomic files and folders
    fsynced.py       fsynced files, and their digests
    run_files.py     names of the files of a run
    metrics_file.py  reading metrics.jsonl
    ranks.py         which process acts and prints for all
    tables.py        tables as text
    environment.py   machine, versions and commit
    imports.py       missing packages
    errors.py        errors of several packages

Only environment.py imports torch; ranks.py does when it is called.
"""
