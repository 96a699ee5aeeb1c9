"""The Hub, the embedded model and text, safe reading of foreign files, and directories written as a whole."""
