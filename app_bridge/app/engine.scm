; What Apple's engine of a bundle says in plain words, as facts.scm does of an app: a capture is named after the field of
; EngineFacts that it gives; captures that begin with _ only select.

((equality_expression lhs: (simple_identifier) @_version rhs: (line_string_literal) @metadata_version)
 (#eq? @_version "version"))
((equality_expression
  lhs: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_kind))
  rhs: (prefix_expression target: (simple_identifier) @kind))
 (#eq? @_kind "kind"))

; The prompt and the end of an answer.
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_call))
  (call_suffix (value_arguments . (value_argument value: (line_string_literal) @stop_token) .)))
 (#eq? @_call "convertTokenToId"))
((nil_coalescing_expression
  value: (call_expression (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_call)))
  if_nil: (line_string_literal) @fallback_token)
 (#eq? @_call "convertIdToToken"))
((nil_coalescing_expression
  value: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_most))
  if_nil: (integer_literal) @answer)
 (#eq? @_most "maximumResponseTokens"))

; The decoder.
((equality_expression
  lhs: (navigation_expression
    target: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_names))
    suffix: (navigation_suffix suffix: (simple_identifier) @_count))
  rhs: (integer_literal) @inputs)
 (#eq? @_names "inputNames") (#eq? @_count "count"))
((equality_expression
  lhs: (navigation_expression
    target: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_names))
    suffix: (navigation_suffix suffix: (simple_identifier) @_count))
  rhs: (integer_literal) @states)
 (#eq? @_names "stateNames") (#eq? @_count "count"))
((call_expression . (simple_identifier) @_call
  (call_suffix (value_arguments . (value_argument value: (integer_literal) @grows_from))))
 (#eq? @_call "min"))
