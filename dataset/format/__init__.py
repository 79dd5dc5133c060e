"""The files on disk: shards, index and manifest. No torch; h5py only to write, and to verify."""
