"""The paper's tables: what is published, which settings make each row, and a command that measures them."""
