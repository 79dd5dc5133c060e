"""Where files are: a local path, or an object of S3, GCS, Azure or a web server. No torch."""
