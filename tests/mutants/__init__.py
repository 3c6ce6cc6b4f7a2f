"""Planted bugs: what the tests of this package must see.

In: a copy of the package, and a table of bugs, each a pattern of Python that occurs once in it. Out: for every bug the
test that fails with it, or the news that none does. Read `planting` (how a bug gets in), `table_*` (the bugs, by what
they break), `running` (the tests in a process of their own), `__main__` (`make mutants`).
"""
