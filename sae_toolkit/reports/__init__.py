"""What an evaluation leaves behind: tables, plots, HTML and Markdown reports, and a model card on the Hub."""
