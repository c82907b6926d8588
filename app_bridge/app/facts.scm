; What an app says of a model in plain words, as tree-sitter queries. A capture is named after the field of AppFacts, or
; after the entry of "names" or "listed" in published.json, that it gives; captures that begin with _ only select.

; The registrations: their strings, what is decoded, what is made of it.
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_register))
  (call_suffix (value_arguments . (value_argument value: (_) @model_type))))
 (#eq? @_register "registerModelType"))
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_register))
  (call_suffix (value_arguments . (value_argument value: (_) @processor_class))))
 (#eq? @_register "registerProcessorType"))
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_register))
  (call_suffix (lambda_literal (statements
    (property_declaration value: (call_expression (call_suffix (value_arguments
      . (value_argument value: (navigation_expression target: (_) @model_configuration
          suffix: (navigation_suffix suffix: (simple_identifier) @_self)))))))
    (control_transfer_statement result: (call_expression . (simple_identifier) @constructed_model))))))
 (#eq? @_register "registerModelType") (#eq? @_self "self"))
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_register))
  (call_suffix (lambda_literal (statements
    (property_declaration value: (call_expression (call_suffix (value_arguments
      . (value_argument value: (navigation_expression target: (_) @processor_configuration
          suffix: (navigation_suffix suffix: (simple_identifier) @_self)))))))
    (control_transfer_statement result: (call_expression . (simple_identifier) @constructed_processor))))))
 (#eq? @_register "registerProcessorType") (#eq? @_self "self"))
((simple_identifier) @decoding_strategy (#eq? @decoding_strategy "keyDecodingStrategy"))

; The call of Core ML: what goes in, and what is demanded of what comes out.
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_call))
  (call_suffix (value_arguments . (value_argument name: (value_argument_label (simple_identifier) @input_name)) .)))
 (#eq? @_call "prediction") (#not-any-of? @input_name "from" "input"))
((call_expression . (simple_identifier) @_call (call_suffix (value_arguments
  (value_argument name: (value_argument_label (simple_identifier) @_label) value: (_) @input_shape))))
 (#eq? @_call "MLMultiArray") (#eq? @_label "shape"))
((call_expression . (simple_identifier) @_call (call_suffix (value_arguments
  (value_argument name: (value_argument_label (simple_identifier) @_label) value: (_) @input_dtype))))
 (#eq? @_call "MLMultiArray") (#eq? @_label "dataType"))
((equality_expression
  lhs: (navigation_expression
    target: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @output_name))
    suffix: (navigation_suffix suffix: (simple_identifier) @_of))
  rhs: (_) @output_shape)
 (#eq? @_of "shape"))
((equality_expression
  lhs: (navigation_expression
    target: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @output_name))
    suffix: (navigation_suffix suffix: (simple_identifier) @_of))
  rhs: (_) @output_dtype)
 (#eq? @_of "dataType"))
((call_expression . (simple_identifier) @_call
  (call_suffix (value_arguments (value_argument value: (array_literal) @output_shape))))
 (#eq? @_call "MLXArray"))
((property_declaration
  name: (pattern (simple_identifier) @_name)
  (type_annotation (optional_type (user_type) @model_class)))
 (#eq? @_name "_model"))

; The prompt.
((property_declaration name: (pattern (simple_identifier) @_name) value: (_) @image_token) (#eq? @_name "imageToken"))
((property_declaration name: (pattern (simple_identifier) @_name) value: (_) @patch_size) (#eq? @_name "patchSize"))
((property_declaration name: (pattern (simple_identifier) @_name) value: (_) @additional_image_tokens)
 (#eq? @_name "numAdditionalImageTokens"))
((dictionary_literal value: (line_string_literal) @_system value: (_) @system_prompt) (#eq? @_system "\"system\""))
((additive_expression lhs: (multiplicative_expression)) @image_tokens)
((line_string_literal interpolation: (_) interpolation: (_)) @turn (#match? @turn "role(.|\n)*content"))
((additive_expression
  lhs: (call_expression
    (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_joined))
    (call_suffix (value_arguments (value_argument value: (_) @turn_separator))))
  rhs: (_) @prompt_end)
 (#eq? @_joined "joined"))

; The bundle, and the limits of a session.
((call_expression . (simple_identifier) @_call (call_suffix (value_arguments
  (value_argument value: (navigation_expression target: (simple_identifier) @bundle_class)))))
 (#eq? @_call "Bundle"))
((navigation_expression target: (simple_identifier) @bundle_class
  suffix: (navigation_suffix suffix: (simple_identifier) @_main))
 (#eq? @bundle_class "Bundle") (#eq? @_main "main"))
((call_expression
  (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_url))
  (call_suffix (value_arguments
    . (value_argument name: (value_argument_label (simple_identifier) @_resource))
    . (value_argument name: (value_argument_label (simple_identifier) @_extension)) .) @bundle_resource))
 (#eq? @_url "url") (#eq? @_resource "forResource") (#eq? @_extension "withExtension"))
((value_argument name: (value_argument_label (simple_identifier) @_label) value: (_) @cache_limit)
 (#eq? @_label "cacheLimit"))
((assignment
  target: (directly_assignable_expression
    (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_limit)))
  result: (_) @cache_limit)
 (#eq? @_limit "cacheLimit"))
((if_statement
  condition: (infix_expression
    lhs: (navigation_expression suffix: (navigation_suffix suffix: (simple_identifier) @_count))
    op: (custom_operator) @_least
    rhs: (_) @max_tokens)
  (statements (control_transfer_statement result: (prefix_expression target: (simple_identifier) @_stop))))
 (#eq? @_count "count") (#eq? @_least ">=") (#eq? @_stop "stop"))
((call_expression . (simple_identifier) @_call (call_suffix (value_arguments
  (value_argument name: (value_argument_label (simple_identifier) @_label) value: (_) @max_tokens))))
 (#eq? @_call "GenerateParameters") (#eq? @_label "maxTokens"))
