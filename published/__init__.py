"""Published label sets, made by the code of TokenLabeling and ReLabel, as shards of our own."""
