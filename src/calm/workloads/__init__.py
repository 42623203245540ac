"""What is asked, and when: arrival traces, query sources, prompts and judges, for replay and bench alike.

arrivals.py   World Cup 98, Azure, ServeGen, Mooncake, Poisson, constant, CSV -> seconds
queries.py    domain sets and routing tables of a data directory -> queries with known or judged quality
prompts.py    a row of a domain set -> what a user would type
judge.py      an answer and what was right -> quality 0..1
workload.py   arrivals x queries, for one seed
"""
