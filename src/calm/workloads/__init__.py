"""What is asked, and when: arrival traces, query sources, prompts and judges, for replay and bench alike.

workload.py   arrivals x queries, for one seed: `open_source(spec, models).workload(seed)`
arrivals.py   Poisson, constant, and windows of recorded traces -> seconds
traces.py     World Cup 98, Azure, Mooncake, ServeGen, CSV: the readers
queries.py    what a spec names -> queries with known or judged quality
sets.py       domain sets of a data directory
tables.py     routing tables: the quality of every model on every query
answers.py    answers files: what each model said when it was asked for real
rows.py       one shape for the rows of sets and tables, and their subjects as CALM's domains
held_out.py   which rows are trained on, tuned on, and only measured
names.py      which model of a table is which of the fleet's
prompts.py    a row -> what a user would type
judge.py      an answer and what was right -> quality 0..1
sql.py        whether two SQL queries ask the same
files.py      text files, gzip or plain, with every fault named by file and line
"""
