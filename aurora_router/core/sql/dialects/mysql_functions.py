"""What the built-in functions of MySQL and MariaDB do, and their words: the tables that calls are looked up in.

Pure data. A function that is in no table is unknown, and unknown counts as a write. The tables follow the manuals of MySQL 5.7 to
9 and MariaDB 10.6 to 11.8, and `information_schema.sql_functions` of MariaDB. A server that does not have one of the functions
may have a stored function of that name. So a function that only one of the two families has is a read only there.
"""

from __future__ import annotations

from typing import Final


def _words(table: str) -> frozenset[str]:
    return frozenset(table.split())


# Harmless: the same answer on each server that has the data. Volatile ones are here if it hurts nobody to call them again.
READ: Final = _words("""
    abs acos adddate addtime aes_decrypt aes_encrypt ascii asin atan atan2 avg benchmark bin bit_and bit_count bit_length
    bit_or bit_xor cast ceil ceiling char_length character_length charset coalesce coercibility collation compress concat
    concat_ws conv convert convert_tz cos cot count crc32 cume_dist curdate current_date current_role current_time
    current_timestamp current_user curtime database date date_add date_format date_sub datediff day dayname dayofmonth
    dayofweek dayofyear default degrees dense_rank elt exp export_set extract extractvalue field find_in_set first_value
    floor format from_base64 from_days from_unixtime geometrycollection get_format greatest group_concat hex hour if ifnull
    inet6_aton inet6_ntoa inet_aton inet_ntoa insert instr interval is_ipv4 is_ipv4_compat is_ipv4_mapped is_ipv6 isnull
    json_array json_array_append json_array_insert json_arrayagg json_contains json_contains_path json_depth json_extract
    json_insert json_keys json_length json_merge json_merge_patch json_merge_preserve json_object json_objectagg
    json_overlaps json_pretty json_quote json_remove json_replace json_schema_valid json_search json_set json_table
    json_type json_unquote json_valid json_value lag last_day last_insert_id last_value lcase lead least left length linestring ln
    localtime localtimestamp locate log log10 log2 lower lpad ltrim make_set makedate maketime match max mbrcontains
    mbrdisjoint mbrequals mbrintersects mbroverlaps mbrtouches mbrwithin md5 microsecond mid min minute mod month monthname
    multilinestring multipoint multipolygon name_const now nth_value ntile nullif oct octet_length ord percent_rank
    period_add period_diff pi point polygon position pow power quarter quote radians rand random_bytes rank regexp_instr
    regexp_replace regexp_substr repeat replace reverse right round row row_number rpad rtrim schema sec_to_time second
    session_user sha sha1 sha2 sign sin sleep soundex space sqrt st_area st_asbinary st_asgeojson st_astext st_aswkb
    st_aswkt st_buffer st_centroid st_contains st_convexhull st_crosses st_difference st_dimension st_disjoint st_distance
    st_distance_sphere st_endpoint st_envelope st_equals st_exteriorring st_geomcollfromtext st_geomcollfromwkb
    st_geometrycollectionfromtext st_geometrycollectionfromwkb st_geometryfromtext st_geometryfromwkb st_geometryn
    st_geometrytype st_geomfromgeojson st_geomfromtext st_geomfromwkb st_interiorringn st_intersection st_intersects
    st_isclosed st_isempty st_issimple st_length st_linefromtext st_linefromwkb st_linestringfromtext st_linestringfromwkb
    st_mlinefromtext st_mlinefromwkb st_mpointfromtext st_mpointfromwkb st_mpolyfromtext st_mpolyfromwkb
    st_multilinestringfromtext st_multilinestringfromwkb st_multipointfromtext st_multipointfromwkb st_multipolygonfromtext
    st_multipolygonfromwkb st_numgeometries st_numinteriorrings st_numpoints st_overlaps st_pointfromtext st_pointfromwkb
    st_pointn st_polyfromtext st_polyfromwkb st_polygonfromtext st_polygonfromwkb st_srid st_startpoint st_symdifference
    st_touches st_union st_within st_x st_y std stddev stddev_pop stddev_samp str_to_date strcmp subdate substr substring
    substring_index subtime sum sysdate system_user tan time time_format time_to_sec timediff timestamp timestampadd
    timestampdiff to_base64 to_days to_seconds trim truncate ucase uncompress uncompressed_length unhex unix_timestamp
    updatexml upper user utc_date utc_time utc_timestamp uuid uuid_short values var_pop var_samp variance week weekday
    weekofyear weight_string year yearweek
""")
MYSQL_READ: Final = _words("""
    any_value bin_to_uuid etag format_bytes format_pico_time from_vector geomcollection grouping gtid_subset gtid_subtract
    icu_version is_uuid json_schema_validation_report json_storage_free json_storage_size mbrcoveredby mbrcovers regexp_like
    st_collect st_frechetdistance st_geohash st_geomcollfromtxt st_hausdorffdistance st_isvalid st_latfromgeohash st_latitude
    st_lineinterpolatepoint st_lineinterpolatepoints st_longfromgeohash st_longitude st_makeenvelope st_pointatdistance
    st_pointfromgeohash st_simplify st_swapxy st_transform st_validate statement_digest statement_digest_text string_to_vector
    to_vector uuid_to_bin vector_dim vector_to_string
""")
MARIADB_READ: Final = _words("""
    add_months area asbinary astext aswkb aswkt boundary buffer centroid chr column_add column_check column_create
    column_delete column_exists column_get column_json column_list concat_operator_oracle contains convexhull crc32c crosses
    decode decode_histogram decode_oracle dimension disjoint encode encrypt endpoint envelope equals exteriorring
    geomcollfromtext geomcollfromwkb geometrycollectionfromtext geometrycollectionfromwkb geometryfromtext geometryfromwkb
    geometryn geometrytype geomfromtext geomfromwkb glength interiorringn intersects isclosed isempty isring issimple
    json_array_intersect json_compact json_detailed json_equals json_exists json_loose json_normalize json_object_filter_keys
    json_object_to_array json_query kdf lengthb linefromtext linefromwkb linestringfromtext linestringfromwkb lpad_oracle
    ltrim_oracle mbrequal median mlinefromtext mlinefromwkb mpointfromtext mpointfromwkb mpolyfromtext mpolyfromwkb
    multilinestringfromtext multilinestringfromwkb multipointfromtext multipointfromwkb multipolygonfromtext
    multipolygonfromwkb natural_sort_key numgeometries numinteriorrings numpoints nvl nvl2 old_password overlaps password
    percentile_cont percentile_disc pointfromtext pointfromwkb pointn pointonsurface polyfromtext polyfromwkb polygonfromtext
    polygonfromwkb replace_oracle rownum rpad_oracle rtrim_oracle sformat srid st_boundary st_isring st_pointonsurface
    st_relate startpoint substr_oracle sys_guid to_char touches trim_oracle uuid_v4 uuid_v7 value vec_distance
    vec_distance_cosine vec_distance_euclidean vec_fromtext vec_totext within x y
""")

# Those functions above and below that one of the servers knows by its grammar. In quotes they are stored functions.
UNQUOTED: Final = _words("""
    adddate ascii avg bit_and bit_or bit_xor cast charset coalesce collation column_add column_create column_delete
    column_get contains convert count cume_dist curdate current_date current_role current_time current_timestamp
    current_user curtime database date date_add date_sub day default dense_rank extract first_value format
    geometrycollection get_format group_concat grouping hour if insert interval json_arrayagg json_objectagg json_table
    json_value lag last_value lastval lead left linestring localtime localtimestamp match max median microsecond mid min
    minute mod month multilinestring multipoint multipolygon now nth_value ntile old_password password percent_rank
    percentile_cont percentile_disc point polygon position quarter rank repeat replace reverse right row row_count
    row_number rownum schema second session_user st_collect std stddev stddev_pop stddev_samp subdate substr substring sum
    sysdate system_user time timestamp timestampadd timestampdiff trim trim_oracle truncate user utc_date utc_time
    utc_timestamp value values var_pop var_samp variance week weight_string year
""")

# The answer belongs to the server that is asked.
SERVER: Final = _words("""
    binlog_gtid_pos load_file master_gtid_wait master_pos_wait ps_thread_id roles_graphml source_pos_wait
    validate_password_strength version wait_for_executed_gtid_set wait_until_sql_thread_after_gtids
    wsrep_sync_wait_upto_gtid
""")

# The answer is about one connection, or the lock is held by one.
CONNECTION: Final = _words("""
    connection_id found_rows get_lock lastval ps_current_thread_id row_count wsrep_last_seen_gtid wsrep_last_written_gtid
""")

# Those of CONNECTION that a reader grants, too. Such a lock means nothing to the connections that ask the writer for it.
LOCKS: Final = frozenset({"get_lock"})

# Functions, system variables and a relation about the statements before, which have run on this connection.
RECALLED: Final = _words("error_count found_rows identity last_insert_id row_count session_status warning_count")

# Writes, and functions that would ask the wrong server on a reader, which accepts them silently.
WRITE: Final = _words("is_free_lock is_used_lock nextval release_all_locks release_lock setval")
TRANSIENT: Final = frozenset({"nextval", "setval"})  # those of WRITE that leave nothing on the connection

# Words of both families that may stand before a parenthesis, and cannot be called without quotes: reserved words and types.
KEYWORDS: Final = _words("""
    all and as asc between bigint binary bit blob both by case char character check collate datetime dec decimal desc distinct
    distinctrow div double else enum except exists fixed float for force from group having high_priority in index inner int
    integer intersect join key leading left like limit mediumint nchar not numeric nvarchar on or outer over partition real
    regexp right rlike select set smallint sql_big_result sql_calc_found_rows sql_small_result straight_join text then tinyint
    trailing union using varbinary varchar varying when where xor
""")
# MySQL accepts no keyword as the name of a function, be it reserved or not. MariaDB accepts these.
MYSQL_KEYWORDS: Final = _words("against any columns cube escape lateral of rollup some sql_buffer_result sql_no_cache")

# Relations in the server's own schemas that do not depend on the one server. Relations that are not named here do.
SHARED_RELATIONS: Final = _words("""
    applicable_roles character_sets check_constraints collation_character_set_applicability collations column_privileges
    columns enabled_roles keywords key_column_usage parameters partitions referential_constraints routines
    schema_privileges schemata sequences sql_functions statistics table_constraints table_privileges tables triggers
    user_privileges views
""")
# Columns of those relations that each server fills in for itself: when it made a table, and its own counters.
SERVER_COLUMNS: Final = _words("auto_increment check_time create_time update_time")
SERVER_RELATIONS: Final = _words("partitions tables")
STAR_FOLLOWS: Final = frozenset({",", "."}) | _words("""
    all distinct distinctrow high_priority select sql_big_result sql_buffer_result sql_cache sql_calc_found_rows sql_no_cache
    sql_small_result straight_join
""")
CONNECTION_RELATIONS: Final = _words("""
    profiling session_account_connect_attrs session_connect_attrs session_status session_variables
""")

# Beginnings of the status variables that each connection counts for itself, some of them about the statement before.
STATUS_OF_SESSION: Final = ("created_tmp_", "handler_", "last_query_", "select_", "sort_")

# System variables that one server has, and none of its connections.
SERVER_VARIABLES: Final = _words("""
    aurora_server_id aurora_version basedir datadir gtid_binlog_pos gtid_binlog_state gtid_current_pos gtid_executed
    gtid_purged gtid_slave_pos hostname innodb_read_only log_bin max_connections port read_only server_uuid socket
    super_read_only version version_comment version_compile_machine version_compile_os
""")
