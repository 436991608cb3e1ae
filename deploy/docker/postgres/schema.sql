-- Which batches are in, so that one that comes again is known by one look; and the records, by their
-- own ids, so that one that comes again in another batch is known, too.
CREATE TABLE batches (id text PRIMARY KEY);
CREATE TABLE records (id text PRIMARY KEY, record jsonb NOT NULL);
