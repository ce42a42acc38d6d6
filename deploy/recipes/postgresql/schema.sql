-- The table that sink.json writes, and what analysts read: psql "$DATABASE" -f schema.sql. PostgreSQL 14 or newer.

-- A row for each event. Its key is the event's place in its input topic: a result that comes again replaces its row.
CREATE TABLE sentiment (
    source_topic text NOT NULL,
    source_partition integer NOT NULL,
    source_offset bigint NOT NULL,
    record_key text,                       -- the Kafka record's; null if it has none
    id text NOT NULL,
    label text NOT NULL,
    score double precision,                -- -1 to 1; null for a model whose labels have no scores
    probabilities_negative double precision,
    probabilities_neutral double precision,
    probabilities_positive double precision,
    truncated boolean NOT NULL,
    model text NOT NULL,
    event_time timestamptz,
    processed_at timestamptz NOT NULL,
    minute timestamptz NOT NULL            -- of the event; of its result where the event has no time
        GENERATED ALWAYS AS (
            date_bin('1 minute', coalesce(event_time, processed_at), timestamptz '2000-01-01 00:00:00+00')
        ) STORED,
    PRIMARY KEY (source_topic, source_partition, source_offset)
);

-- Labels, scores and their means of any range are answered from the first index alone, and those of one key from the second.
CREATE INDEX sentiment_by_minute_index ON sentiment (minute, source_topic, record_key) INCLUDE (label, score);
CREATE INDEX sentiment_by_key_index ON sentiment (record_key, minute) INCLUDE (source_topic, label, score);
CREATE INDEX sentiment_by_score_index ON sentiment (score); -- for the most negative

CREATE VIEW sentiment_by_minute AS
SELECT
    minute,
    source_topic AS topic,
    record_key AS key,
    count(*) AS results,
    count(*) FILTER (WHERE label = 'negative') AS negative,
    count(*) FILTER (WHERE label = 'neutral') AS neutral,
    count(*) FILTER (WHERE label = 'positive') AS positive,
    avg(score) AS mean_score
FROM sentiment
GROUP BY minute, source_topic, record_key;

-- The topics that there are. It jumps from one to the next in the primary key, where DISTINCT would read every row.
CREATE VIEW sentiment_topics AS
WITH RECURSIVE topics (topic) AS (
    SELECT min(source_topic) FROM sentiment
    UNION ALL
    SELECT (SELECT min(source_topic) FROM sentiment WHERE source_topic > topic) FROM topics WHERE topic IS NOT NULL
)
SELECT topic FROM topics WHERE topic IS NOT NULL;
