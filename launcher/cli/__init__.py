"""The command line: a file for each group of commands. Parses, calls, prints."""
