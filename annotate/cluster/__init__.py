"""The job on Ray: sessions, teacher actors, decode tasks. The only room that imports ray."""
