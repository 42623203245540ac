"""Questions on invented databases with the SQL that answers them, so that a small model learns to read new tables.

A synchronous grammar (Yu et al. 2021, GraPPa, arXiv 2009.13845): one production draws tables, columns and values and
yields a question and its query together. Words are those of words.toml; no database of Spider is among them.

    databases.py   words -> tables, columns, who refers to whom
    phrases.py     conditions and lists, as a question says them and as a query writes them
    alone.py       productions on one table
    together.py    productions on two tables, one of which refers to the other
    __main__.py    rows of the domain sets' schema, of the train part
"""
