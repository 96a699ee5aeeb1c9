"""What an evaluation leaves: tables, plots, the HTML and Markdown reports, and a model card on the Hub."""
