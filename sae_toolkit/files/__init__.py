"""Downloads from the Hub, safe reading of files of others, atomic directories, and environments for other libraries."""
