"""Is a label set complete, undamaged, of one run and in order?"""
