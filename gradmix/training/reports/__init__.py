"""Tables, plots and reports over runs."""
