"""The output of an evaluation: tables, plots, HTML and Markdown reports, and a model card on the Hub."""
