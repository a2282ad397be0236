"""What the built-in functions of PostgreSQL do, and its words: the tables that calls are looked up in.

Pure data. A function that is in no table is unknown, and unknown counts as a write.

The tables were printed from `pg_proc` of PostgreSQL 16 and 18 (schema pg_catalog): IMMUTABLE and
STABLE functions, without the support functions of types, operators and aggregates. Each STABLE and VOLATILE
one was then looked at, because volatility says nothing about *where* an answer is true. Functions that run SQL from a
string are left out on purpose, so they are unknown (`query_to_xml`, `cursor_to_xml`, `ts_stat`, `ts_rewrite`).
"""

from __future__ import annotations

from typing import Final


def _words(table: str) -> frozenset[str]:
    return frozenset(table.split())


# Harmless: the same answer on each server that has the data. Volatile ones are here if it hurts nobody to call them again.
READ: Final = _words("""
    abbrev abs aclcontains acldefault aclexplode aclinsert aclremove acos acosd acosh age any_value area
    array_agg array_append array_dims array_fill array_length array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_reverse array_sample array_shuffle
    array_sort array_to_json array_to_string array_to_tsvector array_upper ascii asin asind asinh atan atan2
    atan2d atand atanh avg bit bit_and bit_count bit_length bit_or bit_xor bool bool_and bool_or box bpchar
    broadcast btrim bytea cardinality casefold cash_words cbrt ceil ceiling center char char_length
    character_length chr cidr circle clock_timestamp col_description concat concat_ws convert convert_from
    convert_to corr cos cosd cosh cot cotd count covar_pop covar_samp crc32 crc32c cume_dist
    current_database current_query current_schema current_schemas current_setting current_user database_to_xml
    database_to_xml_and_xmlschema database_to_xmlschema date date_add date_bin date_cmp_timestamptz
    date_part date_subtract date_trunc datemultirange daterange decode degrees dense_rank dexp diagonal
    diameter div dlog1 dlog10 dround dtrunc encode enum_first enum_last enum_range enum_send erf erfc every
    exp extract factorial family first_value float4 float8 floor format format_type gamma gcd
    gen_random_uuid generate_series generate_subscripts get_bit get_byte get_current_ts_config
    getdatabaseencoding getpgusername has_any_column_privilege has_column_privilege has_database_privilege
    has_foreign_data_wrapper_privilege has_function_privilege has_language_privilege
    has_largeobject_privilege has_parameter_privilege has_schema_privilege has_sequence_privilege
    has_server_privilege has_table_privilege has_tablespace_privilege has_type_privilege hash_aclitem
    hash_aclitem_extended hash_array hash_array_extended hash_multirange hash_multirange_extended
    hash_numeric hash_numeric_extended hash_range hash_range_extended hash_record hash_record_extended
    hashbool hashboolextended hashbpchar hashbpcharextended hashbytea hashbyteaextended hashchar
    hashcharextended hashcid hashcidextended hashdate hashdateextended hashenum hashenumextended hashfloat4
    hashfloat4extended hashfloat8 hashfloat8extended hashinet hashinetextended hashint2 hashint2extended
    hashint4 hashint4extended hashint8 hashint8extended hashmacaddr hashmacaddr8 hashmacaddr8extended
    hashmacaddrextended hashname hashnameextended hashoid hashoidextended hashoidvector
    hashoidvectorextended hashtext hashtextextended hashtid hashtidextended hashvarlena hashvarlenaextended
    hashxid hashxid8 hashxid8extended hashxidextended height host hostmask icu_unicode_version in_range
    inet_merge inet_same_family initcap int2 int4 int4multirange int4range int8 int8multirange int8range
    interval is_normalized isclosed isempty isfinite ishorizontal isopen isparallel isperp isvertical
    json_agg json_agg_strict json_array_elements json_array_elements_text json_array_length json_build_array
    json_build_object json_each json_each_text json_extract_path json_extract_path_text json_object
    json_object_agg json_object_agg_strict json_object_agg_unique json_object_agg_unique_strict
    json_object_keys json_populate_record json_populate_recordset json_strip_nulls json_to_record
    json_to_recordset json_to_tsvector json_typeof jsonb_agg jsonb_agg_strict jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each
    jsonb_each_text jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg
    jsonb_object_agg_strict jsonb_object_agg_unique jsonb_object_agg_unique_strict jsonb_object_keys
    jsonb_path_exists jsonb_path_exists_tz jsonb_path_match jsonb_path_match_tz jsonb_path_query
    jsonb_path_query_array jsonb_path_query_array_tz jsonb_path_query_first jsonb_path_query_first_tz
    jsonb_path_query_tz jsonb_populate_record jsonb_populate_record_valid jsonb_populate_recordset
    jsonb_pretty jsonb_set jsonb_set_lax jsonb_strip_nulls jsonb_to_record jsonb_to_recordset
    jsonb_to_tsvector jsonb_typeof justify_days justify_hours justify_interval lag last_value lcm lead left
    length lgamma like like_escape line ln lo_get log log10 lower lower_inc lower_inf lpad lseg ltrim
    macaddr macaddr8 macaddr8_set7bit make_date make_interval make_time make_timestamp make_timestamptz
    makeaclitem masklen max md5 min min_scale mod mode money multirange mxid_age name nameconcatoid netmask
    network normalize notlike now npoints nth_value ntile num_nonnulls num_nulls numeric numeric_div_trunc
    numeric_exp numeric_ln numeric_log numeric_sqrt nummultirange numnode numrange obj_description
    octet_length oid oidvectortypes overlaps overlay parse_ident path pclose percent_rank percentile_cont
    percentile_disc pg_basetype pg_char_to_encoding pg_client_encoding pg_collation_for
    pg_collation_is_visible pg_column_compression pg_column_is_updatable pg_column_size
    pg_column_toast_chunk_id pg_conversion_is_visible pg_database_size
    pg_describe_object pg_encoding_max_length pg_encoding_to_char pg_filenode_relation
    pg_function_is_visible pg_get_acl pg_get_catalog_foreign_keys pg_get_constraintdef pg_get_expr
    pg_get_function_arg_default pg_get_function_arguments pg_get_function_identity_arguments
    pg_get_function_result pg_get_function_sqlbody pg_get_functiondef pg_get_indexdef pg_get_keywords
    pg_get_multixact_members pg_get_object_address pg_get_partition_constraintdef pg_get_partkeydef
    pg_get_publication_tables pg_get_replica_identity_index pg_get_ruledef
    pg_get_serial_sequence pg_get_statisticsobjdef pg_get_statisticsobjdef_columns
    pg_get_statisticsobjdef_expressions pg_get_triggerdef pg_get_userbyid pg_get_viewdef pg_has_role
    pg_identify_object pg_identify_object_as_address pg_index_column_has_property pg_index_has_property
    pg_indexam_has_property pg_indexam_progress_phasename pg_indexes_size pg_input_error_info
    pg_input_is_valid pg_lsn pg_opclass_is_visible pg_operator_is_visible pg_opfamily_is_visible
    pg_options_to_table pg_partition_ancestors pg_partition_root pg_partition_tree pg_relation_filenode
    pg_relation_filepath pg_relation_is_publishable pg_relation_is_updatable pg_relation_size
    pg_sequence_parameters pg_size_bytes pg_size_pretty pg_sleep pg_sleep_for
    pg_sleep_until pg_split_walfile_name
    pg_statistics_obj_is_visible pg_table_is_visible pg_table_size pg_tablespace_location pg_tablespace_size
    pg_timezone_abbrevs pg_timezone_abbrevs_abbrevs pg_timezone_abbrevs_zone pg_timezone_names
    pg_total_relation_size pg_trigger_depth pg_ts_config_is_visible pg_ts_dict_is_visible
    pg_ts_parser_is_visible pg_ts_template_is_visible pg_type_is_visible pg_typeof
    pg_wal_lsn_diff pg_walfile_name pg_walfile_name_offset phraseto_tsquery pi plainto_tsquery point polygon
    popen position pow power querytree quote_ident quote_literal quote_nullable radians radius random
    random_normal range_adjacent range_agg range_intersect_agg range_merge rank regclass regexp_count
    regexp_instr regexp_like regexp_match regexp_matches regexp_replace regexp_split_to_array
    regexp_split_to_table regexp_substr regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope
    regr_sxx regr_sxy regr_syy repeat replace reverse right round row_number row_security_active row_to_json
    rpad rtrim scale schema_to_xml schema_to_xml_and_xmlschema schema_to_xmlschema session_user set_bit
    set_byte set_masklen setweight sha224 sha256 sha384 sha512 shobj_description sign similar_escape
    similar_to_escape sin sind sinh slope split_part sqrt starts_with statement_timestamp stddev stddev_pop
    stddev_samp string_agg string_to_array string_to_table strip strpos substr substring sum system_user
    table_to_xml table_to_xml_and_xmlschema table_to_xmlschema tan tand tanh text textlen time timeofday
    timestamp timestamp_cmp_timestamptz timestamptz timestamptz_cmp_date timestamptz_cmp_timestamp timetz
    timezone to_ascii to_bin to_char to_date to_hex to_json to_jsonb to_number to_oct to_regclass
    to_regcollation to_regnamespace to_regoper to_regoperator to_regproc to_regprocedure to_regrole
    to_regtype to_regtypemod to_timestamp to_tsquery to_tsvector transaction_timestamp translate trim_array
    trim_scale trunc ts_debug ts_delete ts_filter ts_headline ts_lexize ts_parse ts_rank ts_rank_cd
    ts_token_type tsmultirange tsquery_phrase tsrange tstzmultirange tstzrange tsvector_to_array
    unicode_assigned unicode_version unistr unnest upper upper_inc upper_inf uuid_extract_timestamp
    uuid_extract_version uuidv4 uuidv7 var_pop var_samp varbit varchar variance websearch_to_tsquery width
    width_bucket xid xml xml_is_well_formed xml_is_well_formed_content xml_is_well_formed_document xmlagg
    xmlcomment xmlconcat2 xmlexists xmltext xmlvalidate xpath xpath_exists
""")

# The answer, or the change, belongs to the server that is asked (so do all `pg_stat_get_*`, by prefix).
# `pg_xact_status` is here because a reader's answer may be late. A snapshot has the transactions that run on one server.
SERVER: Final = _words("""
    inet_server_addr inet_server_port pg_available_extension_versions
    pg_available_extensions pg_available_wal_summaries pg_backup_start_time pg_collation_actual_version
    pg_conf_load_time pg_config pg_control_checkpoint pg_control_init pg_control_recovery pg_control_system
    pg_current_logfile pg_database_collation_actual_version pg_extension_update_paths pg_get_aios
    pg_get_backend_memory_contexts pg_get_loaded_modules pg_get_replication_slots pg_get_shmem_allocations
    pg_get_shmem_allocations_numa pg_get_wait_events pg_get_wal_replay_pause_state
    pg_get_wal_resource_managers pg_get_wal_summarizer_state pg_hba_file_rules pg_ident_file_mappings
    pg_is_in_backup pg_is_in_recovery pg_is_wal_replay_paused pg_jit_available pg_last_committed_xact
    pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp pg_lock_status
    pg_ls_archive_statusdir pg_ls_dir pg_ls_logdir pg_ls_logicalmapdir pg_ls_logicalsnapdir
    pg_ls_replslotdir pg_ls_summariesdir pg_ls_tmpdir pg_ls_waldir pg_notification_queue_usage
    pg_numa_available pg_postmaster_start_time pg_prepared_xact pg_read_binary_file pg_read_file
    pg_reload_conf pg_replication_origin_oid pg_replication_origin_progress
    pg_replication_origin_session_is_setup pg_replication_origin_session_progress pg_rotate_logfile
    pg_settings_get_flags pg_show_all_file_settings pg_show_all_settings pg_show_replication_origin_status
    pg_stat_file pg_stat_have_stats pg_tablespace_databases pg_wal_summary_contents pg_xact_commit_timestamp
    pg_xact_commit_timestamp_origin pg_xact_status txid_status version
    pg_current_snapshot pg_snapshot_xip pg_snapshot_xmax pg_snapshot_xmin pg_visible_in_snapshot
    txid_current_snapshot txid_snapshot_xip txid_snapshot_xmax txid_snapshot_xmin txid_visible_in_snapshot
""")

# The answer is about the open transaction. `set_config` changes the transaction or the session, depending on its last argument.
TRANSACTION: Final = frozenset({"pg_current_xact_id_if_assigned", "set_config", "txid_current_if_assigned"})
SESSION: Final = frozenset({"setseed"})

# The answer is about one connection, or names a process of one server.
CONNECTION: Final = _words("""
    currval inet_client_addr inet_client_port lastval pg_backend_pid pg_blocking_pids pg_cancel_backend
    pg_cursor pg_export_snapshot pg_is_other_temp_schema pg_isolation_test_session_is_blocked
    pg_listening_channels pg_log_backend_memory_contexts pg_my_temp_schema pg_prepared_statement
    pg_safe_snapshot_blocking_pids pg_stat_clear_snapshot pg_terminate_backend
""")

# Writes, locks, and functions that a reader would accept silently and wrongly.
WRITE: Final = _words("""
    brin_desummarize_range brin_summarize_new_values brin_summarize_range gin_clean_pending_list lo_close
    lo_creat lo_create lo_export lo_from_bytea lo_import lo_lseek lo_lseek64 lo_open lo_put lo_tell
    lo_tell64 lo_truncate lo_truncate64 lo_unlink loread lowrite nextval pg_advisory_lock
    pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared
    pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_backup_start pg_backup_stop
    pg_clear_attribute_stats pg_clear_relation_stats pg_copy_logical_replication_slot
    pg_copy_physical_replication_slot pg_create_logical_replication_slot pg_create_physical_replication_slot
    pg_create_restore_point pg_current_wal_flush_lsn pg_current_wal_insert_lsn pg_current_wal_lsn
    pg_current_xact_id pg_drop_replication_slot pg_extension_config_dump pg_import_system_collations
    pg_log_standby_snapshot pg_logical_emit_message pg_logical_slot_get_binary_changes
    pg_logical_slot_get_changes pg_logical_slot_peek_binary_changes pg_logical_slot_peek_changes pg_notify
    pg_promote pg_replication_origin_advance pg_replication_origin_create pg_replication_origin_drop
    pg_replication_origin_session_reset pg_replication_origin_session_setup pg_replication_origin_xact_reset
    pg_replication_origin_xact_setup pg_replication_slot_advance pg_restore_attribute_stats
    pg_restore_relation_stats pg_start_backup pg_stat_force_next_flush pg_stat_reset
    pg_stat_reset_backend_stats pg_stat_reset_replication_slot pg_stat_reset_shared
    pg_stat_reset_single_function_counters pg_stat_reset_single_table_counters pg_stat_reset_slru
    pg_stat_reset_subscription_stats pg_stop_backup pg_stop_making_pinned_objects pg_switch_wal
    pg_sync_replication_slots pg_try_advisory_lock pg_try_advisory_lock_shared pg_try_advisory_xact_lock
    pg_try_advisory_xact_lock_shared pg_wal_replay_pause pg_wal_replay_resume setval txid_current
""")

# Those of WRITE whose work ends with the transaction, or leaves nothing on the connection.
TRANSIENT: Final = _words("""
    nextval pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_current_xact_id pg_logical_emit_message pg_notify
    pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared setval txid_current
""")

# Reserved words, and words that cannot be a function's name: PostgreSQL's pg_get_keywords(), categories R and C of
# 16 to 18, and those of T that stand before a parenthesis. CUBE, ROLLUP and OPERATOR are constructs, too.
KEYWORDS: Final = _words("""
    all analyse analyze and any array as asc asymmetric both case cast check collate column constraint
    create current_catalog current_date current_role current_time current_timestamp current_user default
    deferrable desc distinct do else end except false fetch for foreign from grant group having in initially
    intersect into lateral leading limit localtime localtimestamp not null offset on only or order placing
    primary references returning select session_user some symmetric system_user table then to trailing true
    union unique user using variadic when where window with between bigint bit boolean char character
    coalesce dec decimal exists extract float greatest grouping inout int integer interval json json_array
    json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize json_table
    json_value least merge_action national nchar none normalize nullif numeric out overlay position
    precision real row setof smallint substring time timestamp treat trim values varchar xmlattributes
    xmlconcat xmlelement xmlexists xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable
    current_schema ilike is isnull join left like notnull overlaps right similar verbose cube operator
    rollup
""")

# The first parts of settings that belong to a server, not to an application: those of widely used extensions and services.
SERVER_SETTINGS: Final = _words("""
    alloydb apg_plan_mgmt auth_delay auto_explain azure babelfishpg_tds basic_archive citus cloudsql cron isn neon passwordcheck
    pg_hint_plan pg_partman_bgw pg_prewarm pg_stat_monitor pg_stat_statements pg_trgm pg_wait_sampling pgaudit pglogical plperl
    plpgsql pltcl plv8 postgis postgres_fdw rds repmgr sepgsql spock supautils timescaledb
""")

# Views over the functions above. Reading them asks one server, or one connection.
SERVER_RELATIONS: Final = _words("""
    pg_aios pg_available_extension_versions pg_available_extensions pg_backend_memory_contexts pg_buffercache
    pg_buffercache_numa pg_config pg_file_settings pg_hba_file_rules pg_ident_file_mappings pg_locks pg_prepared_xacts
    pg_replication_origin_status pg_replication_slots pg_sequences pg_settings pg_shmem_allocations
    pg_shmem_allocations_numa pg_stat_activity pg_stat_all_indexes pg_stat_all_tables pg_stat_archiver
    pg_stat_bgwriter pg_stat_checkpointer pg_stat_database pg_stat_database_conflicts pg_stat_gssapi
    pg_stat_io pg_stat_progress_analyze pg_stat_progress_basebackup pg_stat_progress_cluster
    pg_stat_progress_copy pg_stat_progress_create_index pg_stat_progress_vacuum pg_stat_recovery_prefetch
    pg_stat_replication pg_stat_replication_slots pg_stat_slru pg_stat_ssl pg_stat_statements
    pg_stat_statements_info pg_stat_subscription pg_stat_subscription_stats pg_stat_sys_indexes
    pg_stat_sys_tables pg_stat_user_functions pg_stat_user_indexes pg_stat_user_tables pg_stat_wal
    pg_stat_wal_receiver pg_stat_xact_all_tables pg_stat_xact_sys_tables pg_stat_xact_user_functions
    pg_stat_xact_user_tables pg_statio_all_indexes pg_statio_all_sequences pg_statio_all_tables
    pg_statio_sys_indexes pg_statio_sys_sequences pg_statio_sys_tables pg_statio_user_indexes
    pg_statio_user_sequences pg_statio_user_tables pg_wait_events
""")
CONNECTION_RELATIONS: Final = frozenset({"pg_cursors", "pg_prepared_statements", "pg_temp"})
