-- What CALM knows. Documented column by column in docs/reference/knowledge.md.
-- `seq` grows with arrival: retention deletes from its low end, `recent` reads from its high end.
-- No foreign keys: a decision dropped under overload must not take its outcome with it.

CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE requests (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  wall_s REAL,
  kind TEXT,
  tenant TEXT,
  pinned TEXT,
  stream INTEGER,
  query TEXT,
  prompt_chars INTEGER,
  prompt_tokens REAL,
  language TEXT,
  turns INTEGER,
  max_tokens INTEGER,
  samples INTEGER,
  conversation TEXT,
  wants_json INTEGER,
  wants_tools INTEGER,
  embedder TEXT,
  embedding BLOB,
  policy TEXT,
  goal TEXT,
  chosen TEXT,
  score REAL,
  predicted_ttft_s REAL,
  predicted_total_s REAL,
  predicted_output_tokens REAL,
  predicted_energy_j REAL,
  predicted_quality REAL,
  decision_s REAL,
  decision BLOB
) STRICT;

CREATE TABLE outcomes (
  seq INTEGER PRIMARY KEY,
  request_id TEXT NOT NULL UNIQUE,
  wall_s REAL,
  model TEXT,
  status TEXT,
  queue_s REAL,
  load_s REAL,
  prefill_s REAL,
  ttft_s REAL,
  total_s REAL,
  prompt_tokens INTEGER,
  cached_tokens INTEGER,
  completion_tokens INTEGER,
  concurrency INTEGER,
  memory_bytes INTEGER,
  energy_j REAL,
  energy_meter TEXT,
  energy_kind TEXT,
  finish_reason TEXT,
  error TEXT,
  attempts INTEGER
) STRICT;

CREATE TABLE feedback (
  seq INTEGER PRIMARY KEY,
  request_id TEXT NOT NULL,
  wall_s REAL,
  rating REAL,
  source TEXT,
  comment TEXT
) STRICT;

CREATE INDEX feedback_by_request ON feedback (request_id);

CREATE TABLE events (
  seq INTEGER PRIMARY KEY,
  wall_s REAL,
  kind TEXT NOT NULL,
  model TEXT,
  detail TEXT
) STRICT;

CREATE TABLE estimators (
  name TEXT PRIMARY KEY,
  version INTEGER NOT NULL,
  wall_s REAL,
  state BLOB NOT NULL,
  checksum TEXT NOT NULL
) STRICT;
