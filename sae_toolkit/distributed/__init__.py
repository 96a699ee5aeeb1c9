"""The ranks, which are the processes that train one SAE together: starting them, and exchanging data between them."""
