-- How a query was laid out (calm.monitor.form), float16 like `embedding`: without it a rating that comes later would
-- be learned against another expectation than the one the decision was made with.
ALTER TABLE requests ADD COLUMN form BLOB;
