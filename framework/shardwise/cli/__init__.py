"""The command line; each command is one public function."""
