"""What each patch of a student is taught: records of a batch, and targets on its device."""
