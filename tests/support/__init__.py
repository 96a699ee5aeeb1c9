"""What the tests share: processes, files and hosts to test with."""
